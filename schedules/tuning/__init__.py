"""Schedule tuning: configurations are searched, built, checked, timed, and written down in ``tuning_logs/``.

==================== ===========================================================================================
``workload``         what is timed: one attention problem, as ``"b=4 h=16 s=4096 d=128 causal"``
``space``            which configurations a family has for it, and why others are refused
``strategy``         in which order they are tried: exhaustive, random, evolutionary
``candidate``        a configuration of a kernel as a file that a machine without TVM understands
``emit``             candidates to source files (CUDA) or modules (CPU); the only part that needs TVM
``folder``           a folder of candidates that several machines measure together
``compiler``         source files to modules
``child``, ``check``, ``timing``, ``peers``   the process that runs kernels: right numbers first, then time
``measure``          starts such processes, survives them, and writes records
``best``             records to the configurations that ``build_kernels`` takes, and the command where there are none
``report``, ``diff`` pictures and tables of logs
``command``          ``scripts/tune.py``
==================== ===========================================================================================
"""
