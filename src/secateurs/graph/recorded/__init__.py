"""The code of one module as the functions that it calls, so that sizes that stand in it can follow a cut."""
