"""Agents as a plugin of flowmesh: a model with tools, under budgets and in a sandbox."""
