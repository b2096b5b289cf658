"""The barriers of the backward's launches by name, as in :mod:`schedules.families.sm90.barriers`.

dk and dv:

====================== ===================================== ===================== ============== ========
barrier                means                                 arrivals              who waits      parity
====================== ===================================== ===================== ============== ========
``k.full``, ``v.full`` the block's keys, values are there    1 + bytes             every consumer 0
                                                                                   thread
``q.full[stage]``      a tile of queries is there, and what  2 + bytes: producer   every consumer turn
                       belongs to its rows                   of Q, warp of terms   thread
``do.full[stage]``     its gradients of outputs are there    1 + bytes             every consumer turn
                                                                                   thread
``q.empty[stage]``     every consumer warp has its S and dK  8                     producer of Q, turn + 1
                                                                                   warp of terms
``do.empty[stage]``    every consumer warp has its dP and dV 8                     producer of dO turn + 1
====================== ===================================== ===================== ============== ========

dq:

====================== ===================================== ===================== ============== ========
barrier                means                                 arrivals              who waits      parity
====================== ===================================== ===================== ============== ========
``q.full``,            the block's queries, gradients of     1 + bytes             every consumer 0
``do.full``            outputs are there                                           thread
``k.full[stage]``,     a tile of keys, of values is there    1 + bytes             every consumer turn
``v.full[stage]``                                                                  thread
``k.empty[stage]``     every consumer warp has its S and dQ  8                     producer of K  turn + 1
``v.empty[stage]``     every consumer warp has its dP        8                     producer of V  turn + 1
====================== ===================================== ===================== ============== ========

No producer waits for another, and a consumer waits for its products and for what is full; a stage that is waited for
is filled as soon as all consumers have passed the tile that is ``stages`` before, so that nobody waits in a circle.

One named barrier a warpgroup, of 128 threads: no warp of it reads the tile from which it stores its results.
"""

from __future__ import annotations

from schedules.families.sm90.barriers import PRODUCER_ARRIVALS

#: Arrivals at ``q.full`` of the launch for dk and dv: the producer's thread, and the warp that brings the rows' terms.
TERM_ARRIVALS = PRODUCER_ARRIVALS + 1
