"""`far tune`: the cheapest schedules whose pictures keep the distribution of the official one's."""
