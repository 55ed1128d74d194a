//! calico
