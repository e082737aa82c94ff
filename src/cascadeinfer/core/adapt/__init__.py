"""Following the workload at run time: what has been seen lately, where the boundaries go, when to plan anew."""
