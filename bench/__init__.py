"""The yardsticks: what this machine can do at best, and what other servers make of it."""
