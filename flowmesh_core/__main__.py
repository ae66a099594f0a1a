"""``python -m flowmesh_core`` is the same as ``flowmesh``."""

from flowmesh_core.cli import main

if __name__ == "__main__":
    main()
