"""The test suites of other projects, run against this one from a checkout that is named: ``scripts/peer_suites.py``."""
