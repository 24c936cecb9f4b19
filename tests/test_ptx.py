"""The machine that runs PTX: what it computes, and that it finds what it is there to find."""

import struct

import pytest
import torch
from ptx.machine import launch
from ptx.memory import Fault
from ptx.program import parse
from thinning import ALL

THREADS = 64

FRAME = """
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u32 kernel_param_1)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
    ld.param.b64 %rd0, [kernel_param_0];
    ld.param.b32 %r0, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %nctaid.x;
    mad.wide.u32 %rd1, %r1, 4, %rd0;
    shl.b32 %r4, %r1, 2;
    {body}
    ret;
}}
"""


def run(body, out, number=0, grid=1, seed=0):
    """``out``: int32, whose address is in %rd0; %rd1 points at the thread's own element."""
    text = FRAME.format(threads=THREADS, body=body)
    launch(parse(text), grid, [out.data_ptr(), number], shared_bytes=4 * THREADS, seed=seed)
    return out


def zeros(count=THREADS):
    return torch.zeros(count, dtype=torch.int32)


def f32(x):
    return f"0f{struct.unpack('>I', struct.pack('>f', x))[0]:08X}"


def to_int(bits):
    return bits - 2**32 if bits >= 2**31 else bits


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sub.s32 %r9, 3, 5;", -2),
        ("mul.hi.u32 %r9, -1, -1;", -2),
        ("div.s32 %r9, -7, 2;", -3),
        ("rem.s32 %r9, -7, 2;", -1),
        ("shl.b32 %r9, 1, 32;", 0),
        ("shr.s32 %r9, -8, 40;", -1),
        ("shr.u32 %r9, -8, 28;", 15),
        ("bfe.s32 %r9, 0x70, 4, 3;", -1),
        ("bfe.u32 %r9, 0x70, 4, 3;", 7),
        ("prmt.b32 %r9, 0x11223344, 0x55667788, 0x7610;", 0x55663344),
        ("prmt.b32 %r9, 0x80, 0, 0x8888;", -1),
        (f"cvt.rzi.s32.f32 %r9, {f32(-2.9)};", -2),
        (f"cvt.rzi.s32.f32 %r9, {f32(1e20)};", 2**31 - 1),
        (f"min.f32 %r9, {f32(0.0)}, {f32(-0.0)};", to_int(0x80000000)),
        (f"max.f32 %r9, {f32(-0.0)}, {f32(0.0)};", 0),
        (f"max.f32 %r9, 0f7FC00000, {f32(1.0)};", 0x3F800000),
        (f"setp.ltu.f32 %p1, 0f7FC00000, {f32(1.0)}; selp.b32 %r9, 1, 2, %p1;", 1),
        (f"setp.lt.f32 %p1, 0f7FC00000, {f32(1.0)}; selp.b32 %r9, 1, 2, %p1;", 2),
        # Halfway between two bfloat16: to the even one.
        ("cvt.rn.bf16x2.f32 %r9, 0f3F818000, 0f3F808000;", 0x3F823F80),
        ("cvt.s64.s32 %rd9, -5; cvt.u32.u64 %r9, %rd9;", -5),
        ("mov.b16 %rs1, 200; cvt.s16.s8 %rs2, %rs1; cvt.u32.u16 %r9, %rs2;", 0xFFC8),
        ("mov.b64 %rd9, {1, 2}; mov.b64 {_, %r9}, %rd9;", 2),
        ("mul.wide.s32 %rd9, -3, 5; cvt.u32.u64 %r9, %rd9;", -15),
    ],
)
def test_instructions(code, expected):
    out = run(f"{code} st.global.b32 [%rd1 + 0], {{ %r9 }};", zeros())
    assert out.unique().tolist() == [expected]


def test_tensors_without_memory_of_their_own_stand_by():
    bystanders = [torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2, 2).to_mkldnn()]
    assert run("st.global.b32 [%rd1], 1;", zeros()).unique().tolist() == [1], bystanders


def test_threads_part_and_come_together():
    """A loop that each thread leaves after its own number of turns; then the sum over a warp."""
    body = """
    and.b32 %r5, %r1, 3;
    mov.b32 %r6, 0;
$L__1:
    add.s32 %r6, %r6, 1;
    setp.lt.u32 %p1, %r6, %r5;
    @%p1 bra $L__1;
    shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
    add.s32 %r6, %r6, %r7;
    st.global.b32 [%rd1], %r6;
    """
    assert run(body, zeros())[:4].tolist() == [2, 2, 5, 5]


TURNED_ROUND = """
    st.shared.b32 [%r4], %r1;
    {barrier}
    sub.s32 %r5, 252, %r4;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd1], %r6;
"""


def test_a_barrier_between_threads():
    assert run(TURNED_ROUND.format(barrier="bar.sync 0;"), zeros()).tolist() == list(range(THREADS))[::-1]
    with pytest.raises(Fault, match=r"a race: program 0 reads 4 bytes: ld\.shared"):
        run(TURNED_ROUND.format(barrier=""), zeros())


def test_reading_before_another_thread_writes():
    body = (
        "xor.b32 %r5, %r1, 1; mad.wide.u32 %rd2, %r5, 4, %rd0; ld.global.b32 %r6, [%rd2]; {} st.global.b32 [%rd1], 7;"
    )
    run(body.format("bar.sync 0;"), zeros())
    with pytest.raises(Fault, match="a race: program 0 writes"):
        run(body.format(""), zeros())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("st.global.b32 [%rd1 + 4], 1;", "no tensor"),
        ("ld.global.b32 %r9, [%rd0 + -4];", "no tensor"),
        ("ld.global.b32 %r9, [%rd0 + 2];", "no multiple"),
        ("ld.global.v2.b32 {%r8, %r9}, [%rd0 + 4];", "no multiple"),
        ("st.shared.b32 [%r4 + 4], 1;", "shared memory has 256 bytes"),
        ("st.global.b32 [%rd0], %r1;", "different numbers"),
    ],
)
def test_what_must_not_be(code, message):
    with pytest.raises(Fault, match=message):
        run(code, zeros())


MEETING = """
    setp.ne.b32 %p1, %r1, 0;
    @%p1 bra $L__end;
    mad.wide.u32 %rd2, %r2, 4, %rd0;
    add.s32 %r5, %r2, 1;
    st.global.b32 [%rd2 + 4], %r5;
    atom.global.gpu.{release}.add.u32 %r6, [%rd0], 1;
$L__wait:
    ld.global.gpu.{acquire}.b32 %r6, [%rd0];
    setp.lt.u32 %p2, %r6, {awaited};
    @%p2 bra $L__wait;
    sub.s32 %r7, %r3, %r2;
    mul.wide.u32 %rd3, %r7, 4;
    add.s64 %rd3, %rd3, %rd0;
    ld.global.b32 %r8, [%rd3];
    st.global.b32 [%rd2 + 64], %r8;
$L__end:
"""
"""Each program writes its number, waits for all of them, and reads the number of the one opposite."""


@pytest.mark.parametrize("seed", range(3 if ALL else 1))
def test_programs_that_wait_for_each_other(seed):
    words = {"release": "release", "acquire": "acquire", "awaited": "%r3"}
    out = run(MEETING.format(**words), zeros(), grid=5, seed=seed)
    assert out[16:21].tolist() == [5, 4, 3, 2, 1]
    with pytest.raises(Fault, match="a race"):
        run(MEETING.format(**words | {"release": "relaxed"}), zeros(), grid=5, seed=seed)
    with pytest.raises(Fault, match="5 of 5 programs wait for ever"):
        run(MEETING.format(**words | {"awaited": "6"}), zeros(), grid=5, seed=seed)
