//! Trains a tiny network on sixteen of the bundled photos and prints how both losses fall.
//!
//! ```text
//! cargo run --release -p pass-host --example train_on_sixteen_images
//! ```
#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use pass_host::config::presets;
use pass_host::data::index::ImageIndex;
use pass_host::data::loader::{Loader, LoaderSettings, Part};
use pass_host::train::batch::BatchPlan;
use pass_host::train::schedule::Schedules;
use pass_host::train::trainer::Trainer;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = presets::find("demo").ok_or("no preset called demo")?.config();
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/photos");
    config.data.images = vec![photos.display().to_string()];
    config.data.limit = 16;
    config.optim.steps = 40;
    let index = Arc::new(ImageIndex::build(&config.data, None)?);
    let student = Trainer::fresh_student(&config, &Device::Cpu)?;
    let mut trainer = Trainer::new(&config, student, &Device::Cpu)?;
    let plan = BatchPlan {
        accumulate: 1,
        augment: config.augment.clone(),
        drop_path_applications: trainer.student.backbone.drop_path_applications(),
        seed: config.seed,
        dtype: DType::F32,
    };
    let mut loader = Loader::start(LoaderSettings {
        index,
        augment: config.augment.clone(),
        seed: config.seed,
        batch: config.optim.batch,
        part: Part::WHOLE,
        workers: config.data.workers,
        prefetch: config.data.prefetch,
        cursor: 0,
        max_bad: config.data.max_bad,
        max_megapixels: config.data.max_megapixels,
        quarantine: None,
        known_bad: Vec::new(),
    })?;
    let schedules = Schedules::new(&config, 16, 1);
    for step in 0..config.optim.steps as u64 {
        let crops = plan.micro_batches(&loader.next()?, &Device::Cpu)?;
        match trainer.step(&crops, &schedules.at(step))? {
            Ok(report) if step % 10 == 9 => println!(
                "step {:2}  class {:.3}  patch {:.3}",
                step + 1,
                report.loss_image,
                report.loss_patch.unwrap_or(f64::NAN)
            ),
            Ok(_) => {}
            Err(fault) => return Err(format!("{} is {}", fault.term, fault.value).into()),
        }
    }
    Ok(())
}
