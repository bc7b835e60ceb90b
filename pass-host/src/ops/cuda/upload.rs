//! Batches of pixels on their way to a device, in a stream of their own: while one is computed on, the next is sent.
//!
//! Two slots go round, each a page-locked buffer and memory of the device. The sender fills a free slot and queues its
//! copy; whoever computes makes the compute stream wait for the copy; dropping the [`Upload`] lets the sender wait for
//! what was queued so far and have the slot again. Who holds a slot owns it, so neither side can overwrite the other's.
#![cfg_attr(
    feature = "cuda",
    expect(
        unsafe_code,
        reason = "an asynchronous copy takes raw addresses and outlives the call that starts it"
    )
)]

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::augment;
use crate::config::AugmentConfig;
use crate::data::augment::DeviceCrops;
use candle_core::{DType, Device, Result, Tensor, bail};

/// Slots that go round.
const SLOTS: usize = 2;
/// Every image's bytes begin at a multiple of this.
const ALIGNMENT: usize = 16;

/// Sends batches to a device, one after the other.
#[derive(Debug)]
pub struct Uploader {
    lane: lane::Lane,
    free: Receiver<Option<lane::Slot>>,
    back: Sender<Option<lane::Slot>>,
}

/// Ends the wait of an [`Uploader`] for a free slot.
#[derive(Debug)]
pub struct Stop(Sender<Option<lane::Slot>>);

/// A batch on the device, or on its way there.
#[derive(Debug)]
pub struct Upload {
    /// Always there but while it is dropped.
    slot: Option<lane::Slot>,
    layout: Layout,
    back: Sender<Option<lane::Slot>>,
}

/// Where everything lies in the bytes of a batch: the records of all crops, crop 0 of all images first, then the images.
#[derive(Debug, PartialEq)]
struct Layout {
    images: usize,
    /// Where the bytes of each image begin, and where the last end.
    places: Vec<usize>,
    /// Where the middle of each crop begins, and where the last ends.
    middles: Vec<u64>,
}

impl Uploader {
    /// For a CUDA device; for the CPU if the emulator of the kernels was compiled in.
    ///
    /// # Errors
    /// If kernels do not run on the device, or it refuses a stream.
    pub fn new(device: &Device) -> Result<Self> {
        if !super::runs_on(device) {
            bail!("crops are made by kernels, which do not run on {:?}", device.location());
        }
        let (lane, (back, free)) = (lane::Lane::new(device)?, channel());
        for _ in 0..SLOTS {
            // the receiver is here
            let _ = back.send(Some(lane.slot()?));
        }
        Ok(Self { lane, free, back })
    }

    /// What ends [`Uploader::send`] from another thread.
    pub fn stop(&self) -> Stop {
        Stop(self.back.clone())
    }

    /// Queues a batch, as soon as a slot is free; `None` once stopped.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn send(&mut self, images: &[DeviceCrops]) -> Result<Option<Upload>> {
        // this end keeps a sender, so there is always an answer
        let Ok(Some(mut slot)) = self.free.recv() else { return Ok(None) };
        let layout = Layout::of(images)?;
        self.lane.send(&mut slot, layout.len(), |bytes| layout.write(images, bytes))?;
        Ok(Some(Upload { slot: Some(slot), layout, back: self.back.clone() }))
    }
}

impl Stop {
    /// Stops.
    pub fn stop(&self) {
        // nobody listens any more: there is nothing to stop
        let _ = self.0.send(None);
    }
}

impl Upload {
    /// Images of the batch.
    pub fn images(&self) -> usize {
        self.layout.images
    }

    /// Normalized crops `crops` of the images `images`, `[C · I, 3, size, size]` in `dtype`, crop by crop.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn crops(
        &self,
        crops: Range<usize>,
        images: &Range<usize>,
        size: usize,
        augment: &AugmentConfig,
        dtype: DType,
    ) -> Result<Tensor> {
        let Some(slot) = &self.slot else { bail!("an upload that is gone") };
        let row = |crop: usize, image: usize| crop * self.layout.images + image;
        let rows: Vec<_> = crops.map(|crop| row(crop, images.start)..row(crop, images.end)).collect();
        augment::crops(slot.arrived()?, &self.layout.middles, &rows, size, augment, dtype)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(mut slot) = self.slot.take() {
            slot.release();
            // nobody sends any more: the slot is no longer needed
            let _ = self.back.send(Some(slot));
        }
    }
}

impl Layout {
    fn of(images: &[DeviceCrops]) -> Result<Self> {
        let crops = images.first().map_or(0, DeviceCrops::len);
        if images.iter().any(|image| image.len() != crops) {
            bail!("all images of a batch have the same number of crops");
        }
        let mut places = vec![images.len() * crops * DeviceCrops::RECORD];
        let mut middles = vec![0];
        for image in images {
            places.push(places[places.len() - 1] + image.bytes().len().next_multiple_of(ALIGNMENT));
        }
        for crop in 0..crops {
            for image in images {
                middles.push(middles[middles.len() - 1] + image.middle(crop) as u64);
            }
        }
        Ok(Self { images: images.len(), places, middles })
    }

    /// Bytes of the batch, a multiple of 16.
    fn len(&self) -> usize {
        self.places[self.images]
    }

    fn write(&self, images: &[DeviceCrops], bytes: &mut [u8]) {
        let (records, pixels) = bytes.split_at_mut(self.places[0]);
        for (row, record) in records.chunks_exact_mut(DeviceCrops::RECORD).enumerate() {
            let (crop, image) = (row / self.images, row % self.images);
            images[image].write_record(crop, self.places[image] as u64, self.middles[row], record);
        }
        for (image, place) in images.iter().zip(&self.places) {
            let start = place - self.places[0];
            pixels[start..start + image.bytes().len()].copy_from_slice(image.bytes());
        }
    }
}

/// A CUDA device: page-locked memory, a stream for copies, events between the two streams.
#[cfg(feature = "cuda")]
mod lane {
    use std::sync::Arc;

    use candle_core::backend::BackendDevice;
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{
        CudaEvent, CudaStream, PinnedHostSlice, result::memcpy_htod_async,
    };
    use candle_core::{CudaDevice, DType, Device, Result, Shape, Storage, Tensor, bail, op::BackpropOp};

    use super::super::engine::address;

    #[derive(Debug)]
    pub(super) struct Lane {
        device: Device,
        /// Copies; `None` on the CPU.
        copies: Option<(CudaDevice, Arc<CudaStream>)>,
    }

    pub(super) struct Slot {
        memory: Option<Tensor>,
        cuda: Option<Cuda>,
    }

    struct Cuda {
        device: CudaDevice,
        pinned: Option<PinnedHostSlice<u8>>,
        /// The copy is done.
        sent: CudaEvent,
        /// All that reads the memory is done.
        read: CudaEvent,
    }

    impl std::fmt::Debug for Slot {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Slot").field("memory", &self.memory).finish_non_exhaustive()
        }
    }

    impl Lane {
        pub(super) fn new(device: &Device) -> Result<Self> {
            let copies = match device {
                Device::Cuda(cuda) => Some((cuda.clone(), cuda.cuda_stream().context().new_stream().w()?)),
                _ => None,
            };
            Ok(Self { device: device.clone(), copies })
        }

        pub(super) fn slot(&self) -> Result<Slot> {
            let cuda = match &self.copies {
                Some((device, copies)) => {
                    let context = copies.context();
                    let (sent, read) = (context.new_event(None).w()?, context.new_event(None).w()?);
                    Some(Cuda { device: device.clone(), pinned: None, sent, read })
                }
                None => None,
            };
            Ok(Slot { memory: None, cuda })
        }

        /// Fills the slot with `len` bytes, a multiple of 8, and queues their copy.
        pub(super) fn send(
            &mut self,
            slot: &mut Slot,
            len: usize,
            write: impl FnOnce(&mut [u8]),
        ) -> Result<()> {
            let (Some((device, copies)), Some(cuda)) = (&self.copies, &mut slot.cuda) else {
                slot.memory = Some(super::on_cpu(len, write, &self.device)?);
                return Ok(());
            };
            // the last copy out of the buffer; an event that was never recorded is done
            cuda.sent.synchronize().w()?;
            let buffer = match cuda.pinned.take() {
                Some(pinned) if pinned.len() >= len => pinned,
                // SAFETY: bytes are written before they are read, and any byte is a `u8`.
                _ => unsafe { copies.context().alloc_pinned::<u8>(len + len / 4) }.w()?,
            };
            let buffer = cuda.pinned.insert(buffer);
            let bytes = &mut buffer.as_mut_slice().w()?[..len];
            write(bytes);
            let words = len.div_ceil(size_of::<i64>());
            let memory = match slot.memory.take() {
                Some(memory) if memory.elem_count() >= words => memory,
                _ => {
                    let words = words + words / 4;
                    // SAFETY: kernels read only what the copy below has written.
                    let storage = unsafe { device.alloc_uninit(&Shape::from(words), DType::I64) }?;
                    // memory is handed out in the order of the compute stream: the copy must not come before
                    device.cuda_stream().synchronize().w()?;
                    Tensor::from_storage(Storage::Cuda(storage), words, BackpropOp::none(), false)
                }
            };
            let place = address(&memory)?;
            slot.memory = Some(memory);
            copies.wait(&cuda.read).w()?;
            // SAFETY: the memory has room for these bytes. Both sides stay where they are until `sent` is done: the
            // buffer is written to or freed only after waiting for it, and the memory is read or freed only in the
            // compute stream, behind a wait for it (`arrived`) or for all work (`drop`).
            unsafe { memcpy_htod_async(place, bytes, copies.cu_stream()) }.w()?;
            cuda.sent.record(copies).w()
        }
    }

    impl Slot {
        /// The bytes, for work queued in the compute stream from now on.
        pub(super) fn arrived(&self) -> Result<&Tensor> {
            if let Some(cuda) = &self.cuda {
                cuda.device.cuda_stream().wait(&cuda.sent).w()?;
            }
            match &self.memory {
                Some(memory) => Ok(memory),
                None => bail!("a slot that was never filled"),
            }
        }

        /// No more work that reads the bytes will be queued.
        pub(super) fn release(&mut self) {
            if let Some(cuda) = &self.cuda
                && cuda.read.record(&cuda.device.cuda_stream()).is_err()
            {
                // then nothing may stand where it was
                let _ = cuda.device.cuda_stream().synchronize();
            }
        }
    }

    impl Drop for Slot {
        fn drop(&mut self) {
            if let Some(cuda) = &self.cuda {
                // neither side may go while a copy is under way
                let _ = cuda.sent.synchronize();
            }
        }
    }
}

/// The CPU, for the emulator: nothing needs to be sent.
#[cfg(not(feature = "cuda"))]
mod lane {
    use candle_core::{Device, Result, Tensor, bail};

    #[derive(Debug)]
    pub(super) struct Lane {
        device: Device,
    }

    #[derive(Debug, Default)]
    pub(super) struct Slot {
        memory: Option<Tensor>,
    }

    impl Lane {
        pub(super) fn new(device: &Device) -> Result<Self> {
            Ok(Self { device: device.clone() })
        }

        pub(super) fn slot(&self) -> Result<Slot> {
            Ok(Slot::default())
        }

        pub(super) fn send(
            &mut self,
            slot: &mut Slot,
            len: usize,
            write: impl FnOnce(&mut [u8]),
        ) -> Result<()> {
            slot.memory = Some(super::on_cpu(len, write, &self.device)?);
            Ok(())
        }
    }

    impl Slot {
        pub(super) fn arrived(&self) -> Result<&Tensor> {
            match &self.memory {
                Some(memory) => Ok(memory),
                None => bail!("a slot that was never filled"),
            }
        }

        pub(super) fn release(&mut self) {}
    }
}

/// `len` bytes as a tensor of the CPU.
fn on_cpu(len: usize, write: impl FnOnce(&mut [u8]), device: &Device) -> Result<Tensor> {
    let mut bytes = vec![0; len];
    write(&mut bytes);
    let words: Vec<i64> = bytes.as_chunks::<8>().0.iter().map(|word| i64::from_le_bytes(*word)).collect();
    let count = words.len();
    Tensor::from_vec(words, count, device)
}
