"""Pytest fixtures, registered as the ``flowmesh`` plugin; nothing heavy is imported until one is used."""
