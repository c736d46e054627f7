"""Quantizers that each break one promise of the contract, made from the template's honest one."""
