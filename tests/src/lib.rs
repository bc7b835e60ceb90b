//! What the integration tests share: golden fixtures and tolerances.
