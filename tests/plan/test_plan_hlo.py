"""Reading compiled modules: a small one in the TPU compiler's own style."""

import textwrap

import pytest

from moss_audio_jax.plan.hlo import Made, Module


def cycles(n: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{n}"}}}}'


# A loop of 36 layers with an overlapped gather (three fused parts of one exchange), a fused
# reduce-scatter, a synchronous all-reduce; a conditional; a kernel; a start and done pair.
TEXT = f"""\
HloModule jit_train_step, is_scheduled=true

%gather_start (param_0: bf16[16,64]) -> (bf16[16,64], bf16[64,64], u32[]) {{
  %param_0 = bf16[16,64]{{1,0}} parameter(0)
  %all-gather.1 = bf16[64,64]{{1,0:T(8,128)}} all-gather(%param_0), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=1] {{'axis_0'}}, dimensions={{0}}, \
metadata={{op_name="jit(train_step)/mlp/up_proj"}}
  ROOT %custom-call.1 = (bf16[16,64], bf16[64,64], u32[]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.2 (param_0.1: bf16[16,64]) -> bf16[64,64] {{
  %param_0.1 = bf16[16,64]{{1,0}} parameter(0)
  ROOT %all-gather.2 = bf16[64,64]{{1,0}} all-gather(%param_0.1), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=1] {{'axis_0'}}, dimensions={{0}}
}}

%all-reduce-scatter.1 (input: f32[64,32]) -> f32[16,32] {{
  %input = f32[64,32]{{1,0}} parameter(0)
  %all-reduce.9 = f32[64,32]{{1,0}} all-reduce(%input), channel_id=8, \
replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  ROOT %slice.1 = f32[16,32]{{1,0}} dynamic-slice(%all-reduce.9)
}}

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}

%condition (state: (s32[], bf16[64,64])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(36)
  %state = (s32[], bf16[64,64]) parameter(0)
  %index = s32[] get-tuple-element(%state), index=0
  ROOT %lt.1 = pred[] compare(%index, %limit), direction=LT
}}

%body (state.1: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {{
  %state.1 = (s32[], bf16[64,64]) parameter(0)
  %begin = (bf16[16,64], bf16[64,64], u32[]) fusion(%state.1), kind=kCustom, \
calls=%gather_start, {cycles(10)}
  %middle = bf16[64,64]{{1,0}} fusion(%begin), kind=kOutput, calls=%async_collective_fusion.2, \
{cycles(1000)}
  %scattered = f32[16,32]{{1,0}} fusion(%middle), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[64,64]) tuple(%state.1, %middle)
}}

%cheap (a: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  ROOT %nothing = f32[] fusion(%a), kind=kLoop, calls=%add, {cycles(1)}
}}

%dear (b: f32[]) -> f32[] {{
  %b = f32[] parameter(0)
  ROOT %much = f32[] fusion(%b), kind=kLoop, calls=%add, {cycles(500)}
}}

ENTRY %main (p: bf16[16,64]) -> f32[] {{
  %p = bf16[16,64]{{1,0}} parameter(0)
  %loop = (s32[], /*index=1*/bf16[64,64]) while(%p), condition=%condition, body=%body
  %all-reduce.3 = f32[100,10]{{1,0}} all-reduce(%loop), channel_id=1, \
replica_groups=[2,4]<=[8], to_apply=%add
  %kernel = bf16[8,128]{{1,0}} custom-call(%p), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(train_step)/splash_mha_fwd"}}
  %permute = (bf16[8,128], bf16[8,128], u32[]) collective-permute-start(%kernel), channel_id=2
  %permuted = bf16[8,128] collective-permute-done(%permute)
  %logits = bf16[256,384]{{1,0}} fusion(%permuted), kind=kLoop, calls=%add, {cycles(7)}
  ROOT %either = f32[] conditional(%all-reduce.3), branch_computations={{%cheap, %dear}}
}}
"""


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(TEXT, devices=4)


def test_loops_multiply_cycles_and_the_dear_branch_counts(module):
    assert module.trip_counts() == {"loop": 36}
    assert module.cycles() == 36 * (10 + 1000) + 7 + 500


def test_cycles_that_the_compiler_does_not_know_count_nothing():
    """libtpu writes the largest int64 for gathers on the SparseCore."""
    assert Module(TEXT.replace(cycles(7), cycles(2**63 - 1)), devices=4).cycles() == 36 * 1010 + 500


def test_collectives_by_kind_size_and_overlap(module):
    found = {c.kind: c for c in module.collectives()}
    assert len(found) == len(module.collectives()) == 4

    gather = found["all-gather"]  # two fused parts on one channel are one exchange
    assert (gather.bytes, gather.times, gather.group) == (64 * 64 * 2, 36, 4)
    assert gather.overlapped
    assert gather.source == "jit(train_step)/mlp/up_proj"
    assert gather.moved == 36 * 64 * 64 * 2 * 3 / 4

    scatter = found["reduce-scatter"]  # the compiler writes it as a fused all-reduce
    assert (scatter.bytes, scatter.times, scatter.group) == (64 * 32 * 4, 36, 4)
    assert not scatter.overlapped

    reduce = found["all-reduce"]
    assert (reduce.bytes, reduce.times, reduce.group) == (4000, 1, 4)
    assert reduce.moved == 2 * 4000 * 3 / 4

    assert found["collective-permute"].overlapped
    assert found["collective-permute"].moved == 8 * 128 * 2


def test_reduce_scatters_of_shard_map_share_a_channel():
    two = [
        f"  %scatter.{n} = f32[16,{32 * n}]{{1,0}} reduce-scatter(%p), channel_id=1, "
        "replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add\n"
        for n in (1, 2)
    ]
    text = TEXT.replace("  %all-reduce.3", "".join(two) + "  %all-reduce.3")
    found = [
        c for c in Module(text, 4).collectives() if c.kind == "reduce-scatter" and c.times == 1
    ]
    assert [(c.bytes, c.group, c.overlapped) for c in found] == [
        (64 * 32 * 4, 4, False),
        (64 * 64 * 4, 4, False),
    ]


def test_kernels_and_whole_arrays(module):
    assert module.kernels() == ["jit(train_step)/splash_mha_fwd"]
    assert module.holds(256, 384) == ["logits"]
    assert module.holds(384, 256) == []


def test_known_trip_count_wins():
    text = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert Module(text, 4).trip_counts() == {"loop": 5}


def test_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        Module(textwrap.dedent("HloModule nothing\n"), 1)


def test_one_turn_of_the_costliest_loop(module):
    turn = module.turn()
    assert turn.cycles() == 1010
    assert module.cycles() == 36 * 1010 + 507  # the whole is as it was
    assert {c.kind: c.times for c in turn.collectives()} == {"all-gather": 1, "reduce-scatter": 1}


IN_PLACE = """\
HloModule jit_decode, is_scheduled=true

%update (a: bf16[4,8,16], b: bf16[8,16]) -> bf16[4,8,16] {
  %a = bf16[4,8,16]{2,1,0} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  ROOT %put = bf16[4,8,16]{2,1,0} dynamic-update-slice(%a, %b)
}

%whole (c: s8[4,8,16]) -> bf16[4,8,16] {
  %c = s8[4,8,16]{2,1,0} parameter(0)
  ROOT %converted = bf16[4,8,16]{2,1,0} convert(%c)
}

%condition (s: (s32[], bf16[4,8,16])) -> pred[] {
  %limit = s32[] constant(7)
  %s = (s32[], bf16[4,8,16]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (t: (s32[], bf16[4,8,16])) -> (s32[], bf16[4,8,16]) {
  %t = (s32[], bf16[4,8,16]) parameter(0)
  %cache = bf16[4,8,16]{2,1,0} get-tuple-element(%t), index=1
  %written = bf16[4,8,16]{2,1,0} fusion(%cache, %t), kind=kLoop, calls=%update
  %layer = s8[8,16]{1,0:T(8,128)(4,1)S(1)} dynamic-slice(%t)
  %fetched = (s8[8,16]{1,0:T(8,128)S(1)}, s8[8,16]{1,0}, u32[]{:S(2)}) copy-start(%t)
  %cut = ((s8[4,8,16]{2,1,0}), s8[8,16]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%t)
  %copied = s8[1,8,16]{2,1,0:T(8,128)(4,1)} copy(%layer)
  ROOT %next = (s32[], bf16[4,8,16]) tuple(%t, %written)
}

ENTRY %main (p: s8[4,8,16]) -> bf16[4,8,16] {
  %p = s8[4,8,16]{2,1,0} parameter(0)
  %dense = bf16[4,8,16]{2,1,0} fusion(%p), kind=kLoop, calls=%whole
  %loop = (s32[], bf16[4,8,16]) while(%dense), condition=%condition, body=%body
  ROOT %out = bf16[4,8,16]{2,1,0} get-tuple-element(%loop), index=1
}
"""


def test_copies_are_told_from_updates_prefetches_and_names():
    module = Module(IN_PLACE, devices=1)
    sizes = {4 * 8 * 16, 8 * 16}
    assert module.turn().made(sizes) == [Made("copied", "copy", 128, 1)]
    assert module.made(sizes, loops=False) == [Made("dense", "fusion", 1024, 1)]
    found = {(made.name, made.times) for made in module.made(sizes)}
    assert found == {("dense", 1), ("copied", 7)}
