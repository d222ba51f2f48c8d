"""Records become tables, effects and verdicts; computes no cell."""
