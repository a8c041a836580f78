"""The whole way to an entry: a plan of stages within a time, and the recipe that makes the same entry again."""
