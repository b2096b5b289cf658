"""The barriers of a Hopper kernel by name: who arrives, how often, who waits, for which phase.

Transaction barriers lie in shared memory (``mbarrier``); one completes a phase when it has had its arrivals and TMA has
written the bytes that were announced.  A thread waits for the parity of a phase.  ``turn`` is how often a stage, or a
place for outputs, has been used before; ``C`` is the number of consumer warpgroups.

====================== ======================================== ============= ======================= =================
barrier                means                                    arrivals      who waits               parity
====================== ======================================== ============= ======================= =================
``q.full[stage]``      a work tile's queries are there          1 + bytes     every consumer thread   turn
``q.empty[stage]``     they are needed no more: in AliasesQ     1             producer of Q           turn + 1
                       when the store thread has stored the
                       outputs in their place, in OwnMemory     4 C
                       when each consumer warp has its scores
``k.full``, ``v.full`` a tile of keys, of values is there       1 + bytes     every consumer thread   turn
``k.empty``,           every consumer warp has released it      4 C           producer of K, of V     turn + 1
``v.empty``
``full``, ``empty``    the same of the tiles of a tensor that   1 + bytes; 4  the threads of that     turn; turn + 1
(TensorBoxes)          are one warpgroup's own                                warpgroup; their
                                                                              producer
``written``            the warps of one warpgroup have left     4             the store thread        turn
                       their outputs in shared memory
``turn`` (OwnMemory)   a warpgroup may use the memory for       1, by the     every thread of that    turn
                       outputs: that of the one before is       store thread  warpgroup
                       stored
``known`` (ragged)     it is known what a work tile is          1, by the     producers of K and V,   turn
                                                                warp that     the store thread, every
                                                                finds it      consumer thread
``done`` (ragged)      they need to know it no more             4 C + 3       the warp that finds     turn + 1
                                                                              tiles
====================== ======================================== ============= ======================= =================

Named barriers are the machine's sixteen (``bar.sync``, ``bar.arrive``, ``barrier.sync``); 0 is the whole block's.

=========================== =================================================== ======= ==============================
number                      means                                               threads who
=========================== =================================================== ======= ==============================
``FIRST_TURN + w``          ping-pong: warpgroup ``w`` may issue its products   256     the one before arrives, ``w``
                                                                                        waits
``FIRST_TURN + C + w``      no warp of warpgroup ``w`` reads its queries any    128     ``w`` arrives and waits
                            more
=========================== =================================================== ======= ==============================

Two warpgroups that score tiles of keys in turn, for outputs whose columns they share (``latent_kernel.py``):

=========================== =================================================== ======= ==============================
``SCORED``                  no warp of warpgroup 0 reads keys for its scores    128     0 arrives and waits
                            any more
``HANDED_OVER + w``         the probabilities of warpgroup ``w`` are in shared  256     ``w`` arrives, the other waits
                            memory
``REFERRED + w``            the references of its rows are                      256     the same
``TOGETHER``                both have come to the same place                    256     both arrive and wait
``ISSUED``                  warpgroup 0 has issued the products of its scores   256     0 arrives, 1 waits
=========================== =================================================== ======= ==============================
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.backend.cuda.lang import MBarrier
from tvm.ir import Expr
from tvm.script import tirx as T

#: Warps of a warpgroup; where a warpgroup arrives at a transaction barrier, one thread of each warp does.
WARPS = 4
WARPGROUP_THREADS = 32 * WARPS

#: Arrivals of a "full" barrier: the producer's thread, which announces the bytes.
PRODUCER_ARRIVALS = 1
#: Arrivals where the thread that stores outputs says so.
STORE_ARRIVALS = 1

#: First of the named barriers here; barrier 0 is the whole block's.
FIRST_TURN = 1
#: Those of two warpgroups that share the columns of their outputs.
SCORED, ISSUED, TOGETHER, HANDED_OVER, REFERRED = 1, 2, 3, 4, 6


def transaction_barriers(pool, count: int) -> MBarrier:
    """``count`` barriers in shared memory; one thread, which the caller chooses, initialises them."""
    return MBarrier(pool, count, leader=T.bool(True))


def consumer_arrivals(consumers: int) -> int:
    """Arrivals where every consumer warp says so."""
    return WARPS * consumers


@dataclass(frozen=True)
class NamedBarriers:
    """The named barriers of a block with ``consumers`` consumer warpgroups."""

    consumers: int

    @T.inline
    def start_turns(self):
        """The last warpgroup lets the first one begin."""
        T.ptx.bar.arrive(FIRST_TURN, 2 * WARPGROUP_THREADS)

    @T.inline
    def await_turn(self, index):
        """Warpgroup ``index`` waits until the one before it has issued its products."""
        T.ptx.bar.sync(T.Cast("uint32", FIRST_TURN + index), 2 * WARPGROUP_THREADS)

    @T.inline
    def pass_turn(self, index):
        """Warpgroup ``index`` has issued its products: the next one may."""
        T.ptx.bar.arrive(T.Cast("uint32", FIRST_TURN + self.next(index)), 2 * WARPGROUP_THREADS)

    def next(self, index) -> Expr:
        """The warpgroup whose turn comes after that of ``index``."""
        return T.Select(index == self.consumers - 1, 0, index + 1)

    @T.inline
    def queries_read(self, index):
        """Warpgroup ``index`` waits until none of its warps reads its queries."""
        T.ptx.bar.sync(T.Cast("uint32", FIRST_TURN + self.consumers + index), WARPGROUP_THREADS)


@dataclass(frozen=True)
class SharedColumnBarriers:
    """The named barriers of two warpgroups that share the columns of their outputs."""

    @T.inline
    def scored(self):
        """Warpgroup 0 waits until all of its warps have their scores."""
        T.ptx.bar.sync(SCORED, WARPGROUP_THREADS)

    @T.inline
    def hand_over(self, index):
        """Warpgroup ``index`` has left its probabilities to the other one."""
        T.ptx.bar.arrive(HANDED_OVER + index, 2 * WARPGROUP_THREADS)

    @T.inline
    def take_over(self, index):
        """The other warpgroup waits for that."""
        T.ptx.bar.sync(HANDED_OVER + index, 2 * WARPGROUP_THREADS)

    @T.inline
    def refer(self, index):
        """Warpgroup ``index`` has left its references to the other one."""
        T.ptx.bar.arrive(REFERRED + index, 2 * WARPGROUP_THREADS)

    @T.inline
    def take_references(self, index):
        """The other warpgroup waits for that."""
        T.ptx.bar.sync(REFERRED + index, 2 * WARPGROUP_THREADS)

    @T.inline
    def first_issued(self):
        """Warpgroup 0 has issued the products of its scores."""
        T.ptx.bar.arrive(ISSUED, 2 * WARPGROUP_THREADS)

    @T.inline
    def await_first(self):
        """Warpgroup 1 waits for that."""
        T.ptx.bar.sync(ISSUED, 2 * WARPGROUP_THREADS)

    @T.inline
    def meet(self):
        """Both wait for each other, each at a place of its own in the code, which ``bar.sync`` doesn't allow."""
        T.ptx.barrier.sync(TOGETHER, 2 * WARPGROUP_THREADS)
