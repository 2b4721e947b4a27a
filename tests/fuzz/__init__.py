"""Fuzzing of everything that reads files from outside: ``python -m tests.fuzz --seed 1 --count 10000``, `make fuzz`.

Each reader gets generated files, some sound and odd, some damaged. It may accept a file or refuse it with `InputError`:
one printable line that names the file. Anything else is a failure: another exception, more than 20 seconds, more than
4 GiB, a process that dies, a file written elsewhere, or rows and labels other than those of the independent readers in
``independent.py``, which share no code with the library.

Input N of a reader depends on the seed, the reader's name and N alone; ``--readers csv --only N`` repeats one and
``--keep FOLDER`` keeps the files of those that fail. A reader is a row of ``READERS`` in ``readers.py``.
"""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # says that there is no torch
