"""A registry and a cache for tests of other programs, in a thread: with failures, and recorded upstreams.

`plugin` has the fixtures of pytest; `registry` and `mirror` have what they yield.  docs/testing.md describes
them.
"""
