"""What the benchmark and the tuner both do: problems, time, peaks, peers, accuracy.

============= ======================================================================
``workloads`` an attention problem as data and as text, and the grids of them
``timing``    implementations in turn, in random order, in bursts
``others``    rounds that other processes disturbed are repeated
``peaks``     the speed of torch.matmul, which figures are shares of
``peers``     our functions and PyTorch's backends, to be called on a problem
``sample``    a small case with a value of every run-time parameter
``accuracy``  how far a result is from float64
============= ======================================================================

``schedules`` may import this folder, though not the rest of the run time: it needs no compiler, and no pack.
"""
