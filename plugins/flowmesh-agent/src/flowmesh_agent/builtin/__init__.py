"""The tools that come with the plugin, entry points of ``flowmesh.agent.tools`` like any other."""
