"""How tasks reach a worker and how its events leave: one driver per ``FLOWMESH_TRANSPORT``."""
