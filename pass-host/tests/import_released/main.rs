//! Files with the keys and the nesting of released weights (`fixtures/import/make.py`): imported, opened, and compared
//! with what PyTorch makes of them; and the same files cut, changed and mistaken for others.

mod features;
mod files;
mod refused;
