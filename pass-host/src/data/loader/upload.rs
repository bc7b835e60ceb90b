//! The thread that sends complete batches to a device, in order and ahead of time.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

use super::{Parts, Shared, Views};
use crate::data::error::DataError;
use crate::ops::{Stop, Uploader};

/// The thread, what it has sent, and how to end it. The slots of the [`Uploader`] bound how far it runs ahead.
#[derive(Debug)]
pub(super) struct Sending {
    sent: Receiver<Parts>,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Sending {
    pub(super) fn start(shared: &Arc<Shared>, mut uploader: Uploader) -> Self {
        let (shared, stop, (to, sent)) = (Arc::clone(shared), uploader.stop(), channel());
        let thread = std::thread::spawn(move || {
            while let Some(mut parts) = shared.wait_for_oldest() {
                if parts.error.is_none() {
                    match uploader.send(&std::mem::take(&mut parts.for_device)) {
                        Ok(Some(upload)) => parts.batch.views = Views::Uploaded(upload),
                        Ok(None) => return,
                        Err(error) => parts.error = Some((0, DataError::Upload(error))),
                    }
                }
                if to.send(parts).is_err() {
                    return;
                }
            }
        });
        Self { sent, stop, thread: Some(thread) }
    }

    /// The next batch; waits for it if need be.
    pub(super) fn next(&self) -> Result<Parts, DataError> {
        self.sent.recv().map_err(|_| DataError::Ended)
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            // it reports its panics itself
            let _ = thread.join();
        }
    }
}
