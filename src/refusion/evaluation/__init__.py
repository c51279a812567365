"""Measuring: fidelity, tokens per forward, correctness, a sandbox for generated code, and the schema of result files."""
