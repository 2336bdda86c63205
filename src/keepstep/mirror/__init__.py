"""A copy of a run on an object store, from which it carries on when its disk is gone."""
