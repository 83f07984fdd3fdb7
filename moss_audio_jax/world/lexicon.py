"""English words by the slot they fill in a sentence.

Words are written as they are read out: lower case, no digits. The templates in `grammar` name the
slots.
"""

from __future__ import annotations

_LISTS = {
    "name": """
        alice anna ben carol daniel david emma frank george grace hannah helen henry jack james jane
        john julia kate laura leo lily linda lucas lucy maria mark martin mary michael nina oliver
        oscar paul peter rachel robert rosa ruth sam sarah simon sophie susan thomas tom victor
        amelia arthur clara diana edward felix fiona harry ivan karen kevin monica nora olivia
        philip richard sandra stella walter""",
    "relative": """
        mother father sister brother aunt uncle cousin daughter son grandmother grandfather husband
        wife niece nephew neighbour friend boss teammate roommate""",
    "worker": """
        doctor nurse teacher farmer driver pilot baker painter singer dancer lawyer engineer waiter
        cook gardener plumber tailor sailor soldier judge writer actor artist captain carpenter
        cleaner clerk dentist editor electrician fisherman guard hunter librarian manager mechanic
        musician photographer policeman postman professor reporter scientist secretary student""",
    "people": """
        children students teachers farmers workers visitors tourists players neighbours guests
        friends parents doctors drivers soldiers customers""",
    "animal": """
        dog cat horse cow pig sheep goat rabbit fox wolf bear lion tiger monkey elephant mouse duck
        chicken goose frog snake turtle owl eagle parrot pigeon donkey camel deer squirrel hedgehog
        penguin dolphin whale shark spider butterfly bee ant""",
    "animals": """
        dogs cats horses cows pigs goats rabbits foxes wolves bears lions tigers monkeys elephants
        ducks birds frogs snakes turtles owls eagles bees""",
    "food": """
        bread butter cheese rice soup salad pasta chicken fish beef cake pie toast honey jam yogurt
        chocolate porridge pizza sausage bacon pudding curry stew noodles""",
    "fruit": """
        apple banana orange pear peach plum lemon melon mango cherry grape strawberry""",
    "fruits": """
        apples bananas oranges pears peaches plums lemons melons cherries grapes strawberries
        potatoes tomatoes onions carrots cucumbers mushrooms beans peppers eggs""",
    "drink": "water tea coffee milk juice wine beer lemonade cocoa cider",
    "thing": """
        book letter box bag key lamp chair table cup plate bowl bottle knife fork spoon clock watch
        phone camera radio computer picture mirror pillow blanket towel basket bucket hammer ladder
        rope candle umbrella hat coat shirt jacket scarf glove shoe boot belt ring coin ticket map
        newspaper magazine pencil pen notebook guitar piano violin drum ball kite doll toy bicycle
        wallet suitcase envelope parcel broom brush shovel torch helmet bell flag tent carpet
        curtain""",
    "things": """
        books letters boxes bags keys lamps chairs tables cups plates bowls bottles knives forks
        spoons clocks phones pictures pillows blankets towels baskets candles umbrellas hats coats
        shirts shoes boots rings coins tickets maps newspapers pencils flowers stamps balloons
        stones bricks""",
    "vehicle": "car bus train truck boat ship plane taxi van tram ferry bicycle motorcycle tractor",
    "place": """
        garden kitchen park school office station market library museum hospital church castle
        bridge river lake beach forest mountain village farm factory hotel restaurant theatre cinema
        stadium airport harbour bakery bank shop supermarket pharmacy playground valley island cave
        tower square corner cellar attic bathroom bedroom hall garage barn field meadow desert
        university laboratory""",
    "city": """
        london paris berlin madrid rome vienna moscow tokyo boston chicago dublin sydney toronto
        lisbon athens cairo delhi beijing shanghai oslo prague warsaw amsterdam brussels seattle
        denver""",
    "country": """
        england france germany spain italy china japan india canada brazil egypt greece norway
        sweden poland mexico australia kenya peru scotland ireland""",
    "language": "english french german spanish italian chinese japanese russian arabic greek",
    "colour": """
        red blue green yellow black white brown grey orange purple pink silver golden violet""",
    "size": "big small large little huge tiny long short tall heavy light wide narrow thick thin",
    "quality": """
        old new clean dirty broken beautiful ugly cheap expensive strange simple useful empty full
        wet dry soft hard round sharp smooth wooden plastic modern ancient famous ordinary precious
        rusty shiny sticky hollow""",
    "mood": """
        happy sad angry tired hungry thirsty bored excited afraid worried proud lonely nervous calm
        surprised sleepy sick busy ready late early alone quiet cheerful jealous grateful confused
        curious""",
    "trait": """
        kind clever funny honest brave lazy polite rude shy strict patient friendly gentle generous
        careful stubborn cruel wise foolish serious famous young rich poor strong weak""",
    "adverb": """
        slowly quickly quietly loudly carefully suddenly gently happily sadly easily badly secretly
        politely bravely nervously silently eagerly clumsily""",
    "often": "always often usually sometimes never rarely seldom",
    "saw": """
        saw found lost bought sold broke cleaned painted carried dropped hid opened closed repaired
        stole borrowed returned forgot moved pushed pulled lifted threw caught wanted needed liked
        hated loved noticed ordered packed wrapped burned washed touched kicked shook""",
    "see": """
        see find lose buy sell break clean paint carry drop hide open close repair borrow return
        forget move push pull lift throw catch bring keep choose take use""",
    "ran": """
        ran walked jumped slept sat stood waited cried laughed sang danced played worked fell swam
        rested smiled shouted whispered argued disappeared arrived stopped hurried wandered
        stumbled""",
    "run": """
        run walk jump sleep sit stand wait cry laugh sing dance play work swim rest smile shout
        whisper travel study relax exercise""",
    "running": """
        running walking jumping sleeping sitting standing waiting crying laughing singing dancing
        playing working swimming reading writing cooking eating drinking talking driving dreaming
        drawing fishing shopping climbing""",
    "hobby": """
        reading writing cooking painting swimming running dancing singing fishing chess football
        tennis hockey cycling skiing gardening photography basketball knitting sailing""",
    "subject": """
        history music science geography biology chemistry physics art literature mathematics
        economics philosophy""",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "month": """
        january february march april may june july august september october november december""",
    "season": "spring summer autumn winter",
    "daytime": "morning afternoon evening",
    "when": "today yesterday tonight tomorrow",
    "weather": "sunny cloudy rainy windy foggy snowy stormy cold warm hot cool dry freezing mild",
    "falls": "rain snow hail fog thunder lightning frost sunshine",
    "body": "head hand foot arm leg knee back shoulder finger thumb ear eye nose tooth neck",
    "illness": "cold fever cough headache toothache flu",
    "furniture": "table bed desk chair sofa shelf cupboard fridge drawer wardrobe counter stove",
    "room": "kitchen bathroom bedroom hall garage attic cellar office",
    "direction": "north south east west",
    "side": "left right",
    "preposition": "in near behind beside outside",
    "material": "wood stone glass paper metal silk wool cotton leather gold",
    "container": "cup glass bottle bowl bag box plate basket",
    "event": """
        party wedding meeting concert lesson game match festival holiday exam interview conference
        dinner breakfast lunch picnic exhibition funeral birthday""",
    "problem": "noise fire accident storm flood strike delay mistake leak earthquake",
    "sound": """
        bell dog siren train door engine phone clock whistle hammer horn drum crowd""",
    "unit": "minutes hours days weeks months years",
    "money": "dollars pounds euros cents",
    "measure": "miles metres steps kilometres",
    "letter": "first second third fourth fifth sixth seventh eighth ninth tenth last next",
    "exclamation": """
        hello goodbye thanks sorry welcome yes no maybe please stop help wait listen careful
        congratulations wonderful exactly perhaps certainly attention""",
    "connector": "because although while before after until when",
    "degree": "very really quite too rather extremely",
    "abstract": """
        truth secret answer question reason idea plan dream problem story joke promise lie rule
        price name address news danger chance result difference beginning meaning future past""",
    "nation": "english french german spanish italian chinese japanese indian canadian mexican",
    "clothes": "shirt jacket dress skirt coat sweater hat scarf tie sweatshirt uniform",
    "plant": "tree flower rose bush leaf branch grass seed root tulip oak pine",
    "sky": "sun moon sky star cloud wind sea river storm",
    "shape": "circle triangle line star heart cross",
    "vowel_food": "apple egg orange onion",
    "tool": "hammer saw drill knife shovel ladder rope needle pump wrench",
    "said": "said thought believed knew hoped heard felt remembered explained admitted claimed",
}
SLOTS: dict[str, tuple[str, ...]] = {
    slot: tuple(dict.fromkeys(words.split())) for slot, words in _LISTS.items()
}

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_words(number: int) -> str:
    """A number from 0 to 9999 as it is read out: 4021 -> "four thousand and twenty one".

    Raises ValueError outside that range.
    """
    if not 0 <= number <= 9999:
        raise ValueError(f"number_words: {number}; expected 0 to 9999")
    if number < 20:
        return ONES[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return TENS[ten - 2] + (f" {ONES[one]}" if one else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    many, rest = divmod(number, size)
    words = f"{number_words(many)} {name}"
    if rest == 0:
        return words
    return f"{words} {'and ' if rest < 100 else ''}{number_words(rest)}"
