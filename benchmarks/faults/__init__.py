"""The long version of the fault table: every fault is made for real, and what comes out is compared to the bit."""
