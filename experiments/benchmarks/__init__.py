"""Timings and fidelity, as scripts that print ratios from one run; RESULTS.md has what they printed, with device and
date."""
