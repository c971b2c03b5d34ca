"""The real driver on fake actors that take the planned seconds."""
