"""The checks of ``ExecutorSuite``, a file for each thing that an executor has to keep."""
