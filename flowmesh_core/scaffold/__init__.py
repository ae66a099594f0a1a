"""What ``flowmesh new`` writes: a distribution that passes its own tests before it does anything.

``templates/common`` is for every project; ``new`` adds an executor to start from, ``from_file`` the
tests of one that was a single file. ``PACKAGE``, ``TESTS`` and ``DOT_`` in a path stand for what
they say, so that no tool takes a template for code or tests of ours.
"""
