"""In: a Kit. Out: the functions that walk the task table: one for the caller, one for workers.

`begin` publishes a step and says which workers are parked; `run` is thread 0's part of it;
`work` is a worker's life between two parkings. Barriers spin briefly, then yield the processor.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from openlpu.host.emit import I32, I64, KERNEL, PTR, Kit, Value
from openlpu.host.layout import (
    FEW_ROWS,
    LINE_WORDS,
    TASK_BARRIER,
    TASK_KERNEL,
    TASK_WORDS,
    Barrier,
    Context,
)
from openlpu.host.rows import row_count

SPIN = 4000  # pauses before a waiting thread yields
PARK = 2000  # yields before a worker parks: a few milliseconds
BEGIN, RUN, WORK = "begin", "run", "work"


def _atomic(kit: Kit, context: Value, index: Value | int) -> Value:
    return kit.item(context, index, I64)


def _get(kit: Kit, pointer: Value) -> Value:
    return kit.b.load_atomic(pointer, "acquire", 8, typ=I64)


def _pause(kit: Kit) -> None:
    if "x86_64" in kit.target.triple:
        kit.b.call(kit.external("llvm.x86.sse2.pause", ir.VoidType(), []), [])


def _yield(kit: Kit) -> None:
    kit.b.call(kit.external("sched_yield", I32, []), [])


def _define_wait(kit: Kit) -> None:
    """wait(pointer, old, yields): 1 when *pointer != old, 0 after so many yields (0: never)."""
    kind = ir.FunctionType(I64, [PTR, I64, I64])
    with kit.function("wait", kind, internal=True) as (pointer, old, most):
        b = kit.b
        entry, head = b.block, b.append_basic_block("head")
        body, slow = b.append_basic_block("body"), b.append_basic_block("slow")
        fast, changed = b.append_basic_block("fast"), b.append_basic_block("changed")
        give_up, keep = b.append_basic_block("give_up"), b.append_basic_block("keep")
        b.branch(head)
        b.position_at_end(head)
        count = b.phi(I64)
        count.add_incoming(kit.i64(0), entry)
        b.cbranch(b.icmp_signed("!=", _get(kit, pointer), old), changed, body)
        b.position_at_end(body)
        following = b.add(count, kit.i64(1))
        b.cbranch(b.icmp_signed("<", count, kit.i64(SPIN)), fast, slow)
        b.position_at_end(fast)
        _pause(kit)
        count.add_incoming(following, b.block)
        b.branch(head)
        b.position_at_end(slow)
        bounded = b.icmp_signed("!=", most, kit.i64(0))
        late = b.icmp_signed(">=", b.sub(count, kit.i64(SPIN)), most)
        b.cbranch(b.and_(bounded, late), give_up, keep)
        b.position_at_end(keep)
        _yield(kit)
        count.add_incoming(following, b.block)
        b.branch(head)
        b.position_at_end(changed)
        b.ret(kit.i64(1))
        b.position_at_end(give_up)
        b.ret(kit.i64(0))


def _define_barrier(kit: Kit) -> None:
    """barrier(context, threads): all threads of the step meet."""
    with kit.function("barrier", ir.FunctionType(ir.VoidType(), [PTR, I64]), internal=True) as args:
        context, threads = args
        b = kit.b
        arrived, phase = (
            _atomic(kit, context, Context.ARRIVED),
            _atomic(kit, context, Context.PHASE),
        )
        old = _get(kit, phase)
        before = b.atomic_rmw("add", arrived, kit.i64(1), "acq_rel")
        last = b.icmp_signed("==", b.add(before, kit.i64(1)), threads)
        with b.if_else(last) as (then, otherwise):
            with then:
                b.atomic_rmw("xchg", arrived, kit.i64(0), "acq_rel")
                b.atomic_rmw("add", phase, kit.i64(1), "acq_rel")
            with otherwise:
                b.call(kit.module.globals["wait"], [phase, old, kit.i64(0)])


class _Kernel:
    """A loaded pointer as a callee: the builder asks it for the type that opaque pointers lack."""

    function_type = KERNEL

    def __init__(self, pointer: Value) -> None:
        self.type = pointer.type
        self.get_reference = pointer.get_reference


def _define_walk(kit: Kit) -> None:
    """walk(context, thread): every task of the table, with its barrier."""
    with kit.function("walk", ir.FunctionType(ir.VoidType(), [PTR, I64]), internal=True) as args:
        context, thread = args
        b = kit.b
        threads = kit.field(context, Context.THREADS)
        tasks = kit.pointer(context, Context.TASKS)
        shared = b.icmp_signed("!=", kit.field(context, Context.SHARED_KV), kit.i64(0))
        several = b.icmp_signed(">", threads, kit.i64(1))

        def one(i: Value) -> None:
            task = kit.item(tasks, b.mul(i, kit.i64(TASK_WORDS)), I64)
            kernel = kit.pointer(task, TASK_KERNEL)
            b.call(_Kernel(kernel), [context, task, thread, threads])
            kind = kit.field(task, TASK_BARRIER)
            many = b.icmp_signed(">", row_count(kit, context, task), kit.i64(FEW_ROWS))
            needed = b.icmp_signed("==", kind, kit.i64(Barrier.ALWAYS))
            for which, condition in ((Barrier.MANY_ROWS, many), (Barrier.SHARED_KV, shared)):
                is_kind = b.icmp_signed("==", kind, kit.i64(which))
                needed = b.or_(needed, b.and_(is_kind, condition))
            with b.if_then(b.and_(needed, several)):
                b.call(kit.module.globals["barrier"], [context, threads])

        kit.each(kit.i64(0), kit.field(context, Context.TASK_COUNT), one)
        with b.if_then(several):
            b.call(kit.module.globals["barrier"], [context, threads])


def define_walk(kit: Kit) -> None:
    """Define begin, run and work."""
    _define_wait(kit)
    _define_barrier(kit)
    _define_walk(kit)
    b_kind = ir.FunctionType(I64, [PTR])
    with kit.function(BEGIN, b_kind) as (context,):
        b = kit.b
        b.atomic_rmw("add", _atomic(kit, context, Context.GENERATION), kit.i64(1), "acq_rel")

        def wake(t: Value, parked: list[Value]) -> list[Value]:
            at = b.add(kit.i64(Context.WORKERS), b.mul(t, kit.i64(LINE_WORDS)))
            was = b.atomic_rmw("xchg", _atomic(kit, context, at), kit.i64(0), "acq_rel")
            return [b.or_(parked[0], b.shl(was, t))]

        threads = kit.field(context, Context.THREADS)
        (parked,) = kit.loop(kit.i64(1), threads, 1, [kit.i64(0)], wake)
        b.ret(parked)
    with kit.function(RUN, ir.FunctionType(ir.VoidType(), [PTR])) as (context,):
        _with_default_rounding(
            kit, lambda: kit.b.call(kit.module.globals["walk"], [context, kit.i64(0)])
        )
    # work(context, thread, seen generation) -> generation seen when parked
    with kit.function(WORK, ir.FunctionType(I64, [PTR, I64, I64])) as (context, thread, seen):
        b = kit.b
        generation = _atomic(kit, context, Context.GENERATION)
        at = b.add(kit.i64(Context.WORKERS), b.mul(thread, kit.i64(LINE_WORDS)))
        parked = _atomic(kit, context, at)
        entry, head = b.block, b.append_basic_block("head")
        step, park = b.append_basic_block("step"), b.append_basic_block("park")
        recheck, resume = b.append_basic_block("recheck"), b.append_basic_block("resume")
        leave = b.append_basic_block("leave")
        b.branch(head)
        b.position_at_end(head)
        last = b.phi(I64)
        last.add_incoming(seen, entry)
        moved = b.call(kit.module.globals["wait"], [generation, last, kit.i64(PARK)])
        b.cbranch(b.icmp_signed("!=", moved, kit.i64(0)), step, park)
        b.position_at_end(step)
        _with_default_rounding(
            kit, lambda: kit.b.call(kit.module.globals["walk"], [context, thread])
        )
        last.add_incoming(b.add(last, kit.i64(1)), b.block)
        b.branch(head)
        # Park: announce it, then look again; whoever takes the flag back decides who wakes whom.
        b.position_at_end(park)
        b.atomic_rmw("xchg", parked, kit.i64(1), "acq_rel")
        b.cbranch(b.icmp_signed("!=", _get(kit, generation), last), recheck, leave)
        b.position_at_end(recheck)
        was = b.atomic_rmw("xchg", parked, kit.i64(0), "acq_rel")
        b.cbranch(b.icmp_signed("!=", was, kit.i64(0)), resume, leave)
        b.position_at_end(resume)
        last.add_incoming(last, resume)
        b.branch(head)
        b.position_at_end(leave)
        b.ret(last)


def _with_default_rounding(kit: Kit, body: Callable[[], object]) -> None:
    """Run `body` with round-to-nearest and denormals kept, whatever the host program had set."""
    if "x86_64" not in kit.target.triple:
        body()
        return
    saved, ours = kit.scratch(I32, 1), kit.scratch(I32, 1)
    kit.store(kit.i32(0x1F80), ours)
    kit.b.call(kit.external("llvm.x86.sse.stmxcsr", ir.VoidType(), [PTR]), [saved])
    kit.b.call(kit.external("llvm.x86.sse.ldmxcsr", ir.VoidType(), [PTR]), [ours])
    body()
    kit.b.call(kit.external("llvm.x86.sse.ldmxcsr", ir.VoidType(), [PTR]), [saved])
