"""Long runs that judge the whole program from outside, as its users do."""
