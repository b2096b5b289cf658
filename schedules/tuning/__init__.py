"""Schedule tuning: configurations are searched, built, checked, timed, and written down in ``tuning_logs/``.

==================== ===========================================================================================
``kinds``            the kinds of kernels that are tuned, and which kernel a problem is for
``space``            which configurations a family has for it, and why others are refused
``strategy``         in which order they are tried: exhaustive, random, evolutionary
``candidate``        a configuration of a kernel as a file that a machine without TVM understands
``emit``             candidates to source files (CUDA) or modules (CPU); the only part that needs TVM
``folder``           a folder of candidates that several machines measure together
``compiler``         source files to modules
``child``, ``check``, ``timing``, ``peers``   the process that runs kernels: right numbers first, then time
``problem``, ``forms``, ``exact``   a timed problem: its tensors, how sequences lie, some results in float64
``measure``          starts such processes, survives them, and writes records
``best``             records to the configurations that ``build_kernels`` takes, and the command where there are none
``report``, ``tables``  pictures and tables of logs; ``schedules/commands/tune.py`` is the command
==================== ===========================================================================================
"""
