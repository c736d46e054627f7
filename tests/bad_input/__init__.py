"""Everything that a user may get wrong, area by area, each with what the error must say; run by test_bad_input.py."""
