//! NF4 with double quantisation, as bitsandbytes stores it.
