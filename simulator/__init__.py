"""The mesh in virtual time: its own policies, unit and arbiter, on engines that compute no tokens."""
