"""Mandarin sentences: a small grammar over a few hundred characters, written without spaces."""

from __future__ import annotations

import functools
import re

from moss_audio_jax.draw import Draw

_LISTS = {
    "人": "我 你 他 我们 你们 他们 妈妈 爸爸 哥哥 姐姐 弟弟 妹妹 "
    "爷爷 奶奶 叔叔 阿姨 老师 学生 医生 "
    "朋友 同学 邻居 司机 警察 农民 工人 客人 孩子 老人",
    "名": "小明 小红 小华 小李 小王 老张 老刘 小林 小芳 小梅",
    "时": "今天 明天 昨天 后天 早上 上午 中午 下午 晚上 现在 春天 夏天 秋天 冬天 周末 去年 明年",
    "地": "北京 上海 广州 南京 西安 成都 学校 公园 医院 商店 超市 车站 "
    "机场 图书馆 饭店 公司 家里 海边 山上 "
    "河边 教室 厨房 花园 动物园 电影院 银行 邮局",
    "做": "吃饭 睡觉 看书 写字 唱歌 跳舞 跑步 游泳 画画 做饭 买菜 "
    "喝茶 开车 上班 上课 休息 工作 学习 聊天 "
    "打球 爬山 洗衣服 看电影 听音乐 打电话 踢足球 下棋",
    "吃": "米饭 面条 饺子 包子 面包 鸡蛋 牛肉 羊肉 鱼 豆腐 白菜 土豆 "
    "蛋糕 水果 苹果 香蕉 西瓜 葡萄 橘子 草莓",
    "喝": "水 茶 牛奶 咖啡 果汁 啤酒 豆浆 可乐",
    "物": "书 本子 铅笔 电脑 手机 桌子 椅子 杯子 盘子 衣服 帽子 皮鞋 "
    "雨伞 书包 照片 钥匙 手表 自行车 地图 票 "
    "报纸 花 灯 门 窗户 床 镜子 毛巾",
    "动物": "猫 狗 鸟 马 牛 羊 猪 兔子 老虎 狮子 熊猫 猴子 大象 鸭子 鸡 蛇 鱼 狐狸",
    "色": "红色 蓝色 绿色 黄色 黑色 白色 灰色 紫色 粉色",
    "形": "大 小 新 旧 长 短 高 矮 方便 重 漂亮 干净 便宜 贵 好看 奇怪 有名 安静",
    "心": "高兴 难过 生气 累 饿 渴 忙 紧张 害怕 开心 着急 幸福 孤独 满意",
    "气": "冷 热 晴 阴 暖和 凉快 闷热 干燥",
    "下": "下雨 下雪 刮风 打雷 起雾",
    "国": "中国 英国 法国 德国 日本 美国 韩国 印度 俄国",
    "语": "中文 英文 法文 日文 德文",
    "星": "星期一 星期二 星期三 星期四 星期五 星期六 星期天",
    "车": "火车 汽车 飞机 地铁 船 公共汽车 出租车",
    "方": "东 南 西 北 左 右",
    "答": "好 是 不 对 谢谢 你好 再见 请进 没关系 对不起 早上好 晚安 小心 等一下 当然 可以",
}
SLOTS = {slot: tuple(words.split()) for slot, words in _LISTS.items()}
TEMPLATES = (
    "{人}{时}去{地}",
    "{人}在{地}{做}",
    "{名}{时}在{地}{做}",
    "{人}喜欢{做}",
    "{人}不喜欢{做}",
    "{人}想吃{吃}",
    "{人}想喝{喝}",
    "{人}买了{数}个{吃}",
    "{物}在{地}",
    "{人}的{物}是{色}的",
    "这个{物}很{形}",
    "那个{物}不{形}",
    "{人}有一个{形}的{物}",
    "{动物}在{地}",
    "{动物}是{色}的",
    "我看见一只{动物}",
    "公园里有{数}只{动物}",
    "{时}天气很{气}",
    "{地}{时}会{下}",
    "{人}{时}很{心}",
    "你为什么这么{心}",
    "{人}会说{语}",
    "{人}是{国}人",
    "{人}坐{车}去{地}",
    "{车}{时}{数}点到",
    "现在{数}点",
    "现在{数}点半",
    "{星}{人}要{做}",
    "{星}我们去{地}吧",
    "请给我一杯{喝}",
    "请问{地}在哪里",
    "往{方}走",
    "{地}在{方}边",
    "{人}今年{数}岁",
    "这本书{数}块钱",
    "{名}和{名}是好朋友",
    "{人}每天{做}",
    "你喜欢{吃}还是{吃}",
    "请把{物}给我",
    "我的电话是{号}",
    "{人}听见{动物}在叫",
    "外面在{下}",
    "{人}一边{做}一边{做}",
    "因为{下}所以{人}没去{地}",
    "{人}找不到{物}",
)
_SLOT = re.compile(r"\{(\w+)\}")
_DIGITS = "零一二三四五六七八九"


def sentence(draw: Draw, order: str) -> str:
    """One sentence, characters without spaces; `order` is one of `grammar.ORDERS`."""
    if order == "short":
        return draw.choice(SLOTS[draw.choice(("答", "答", "物", "时", "地", "吃", "动物"))])
    if order == "random":  # words of 2 or 3 characters: single ones have too many homophones
        return "".join(draw.choice(_long_words()) for _ in range(draw.integer(2, 4)))
    return _SLOT.sub(lambda match: _word(draw, match[1]), draw.choice(TEMPLATES))


@functools.cache
def characters() -> tuple[str, ...]:
    """Every character that a sentence can hold, sorted."""
    found = {char for words in SLOTS.values() for word in words for char in word}
    found.update(char for template in TEMPLATES for char in _SLOT.sub("", template))
    return tuple(sorted(found | set(_DIGITS) | {"十"}))


@functools.cache
def _long_words() -> tuple[str, ...]:
    return tuple(sorted({word for words in SLOTS.values() for word in words if len(word) > 1}))


def _word(draw: Draw, slot: str) -> str:
    if slot == "数":
        return number(draw.integer(2, 12))
    if slot == "号":
        return "".join(draw.choice(_DIGITS) for _ in range(draw.integer(3, 6)))
    return draw.choice(SLOTS[slot])


def number(value: int) -> str:
    """1 to 99 in characters."""
    ten, one = divmod(value, 10)
    tens = "" if not ten else "十" if ten == 1 else f"{_DIGITS[ten]}十"
    return tens + (_DIGITS[one] if one or not ten else "")
