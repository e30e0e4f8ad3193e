"""Decode and calibrate the probabilities of any head: temperature, forward filter, Viterbi (docs/decoding.md)."""
