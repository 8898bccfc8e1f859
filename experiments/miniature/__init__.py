"""A small world that trains itself: a base and three experts (instruction, maths, code), their items and graders."""
