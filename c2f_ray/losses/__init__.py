"""The formulas of the algorithms, as pure functions of arrays and tensors."""
