"""The barriers of the backward's launches by name, as in :mod:`schedules.families.sm90.barriers`.

dk and dv:

====================== ===================================== ===================== ============== ========
barrier                means                                 arrivals              who waits      parity
====================== ===================================== ===================== ============== ========
``k.full``, ``v.full`` the block's keys, values are there    1 + bytes             every consumer 0
                                                                                   thread
``q.full[stage]``,     a tile of queries and its shifts, of  1 + bytes             every consumer turn
``do.full[stage]``     dO and its −delta, are there                                thread
``q.empty[stage]``     every consumer warp has its S and dK  8                     producer of Q  turn + 1
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

The joint launch has those of dk and dv, but the warpgroup for dq fetches the tiles, and waits for no stage of theirs to
be empty.  Beside them:

====================== ===================================== ===================== ============== ========
barrier                means                                 arrivals              who waits      parity
====================== ===================================== ===================== ============== ========
``ds.full[stage]``     both consumers have left their dS,    8: a thread of each   warpgroup for  turn
                       and are past the tile before          warp                  dq
``ds.empty[stage]``    the products with that dS are done    4: a thread of each   consumers      turn + 1
                                                             warp
====================== ===================================== ===================== ============== ========

No producer waits for another, and a consumer waits for its products and for what is full; a stage that is waited for
is filled as soon as all consumers have passed the tile that is ``stages`` before, so that nobody waits in a circle.

One named barrier a warpgroup, of 128 threads: no warp of it reads the tile from which it stores its results.  Where the
warpgroups share their keys, both wait at one of 256 threads.
"""

from __future__ import annotations

#: The named barrier of both consumer warpgroups.
ALL_CONSUMERS = 1
