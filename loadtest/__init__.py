"""The load-test harness: one driver, one workload and one report for a mesh and for OpenAI-compatible servers."""
