"""Best-of-N quality from a single sample, inside OpenRLHF's own trainer.

The package has four rooms:

- :mod:`bond_plugin.bestofn`: the mathematics (torch only).
- :mod:`bond_plugin.algorithms`: one file an algorithm, and the interface they share (torch only).
- :mod:`bond_plugin.host`: the only place that knows OpenRLHF, Ray, DeepSpeed and vLLM.
- :mod:`bond_plugin.cli`: the ``bond`` command.

Importing the package itself costs nothing: every process of a Ray cluster may do it.
"""

__version__ = "0.2.0"
