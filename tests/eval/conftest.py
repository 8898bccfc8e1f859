from builtin_tasks import builtin_tasks

__all__ = ["builtin_tasks"]  # a fixture of every test here
