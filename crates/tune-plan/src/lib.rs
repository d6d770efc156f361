//! Memory planner: arithmetic only, every term named.
