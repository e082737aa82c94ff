"""Following the workload at run time: what has been seen recently, where the boundaries go, when to plan anew."""
