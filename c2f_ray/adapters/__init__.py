"""The private interfaces of dependencies, one module for each dependency, and nothing else uses any.

`tests/unit/test_adapters.py` checks every private name against the pinned versions.
"""
