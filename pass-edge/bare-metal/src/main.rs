//! Runs a model out of the flash of a Cortex-M and compares all of it, bit for bit, with the workstation.
#![no_std]
#![no_main]

mod expected;
mod scenario;

use core::fmt::Display;

use cortex_m::peripheral::syst::SystClkSource;
use cortex_m_rt::entry;
use cortex_m_semihosting::{debug, hprintln};
use panic_semihosting as _;

use scenario::{MODEL, Memory};

/// Nanoseconds, and so instructions of the emulator, in a tick of the processor's clock.
const TICK: u32 = 40;

#[entry]
fn main() -> ! {
    let status = match cortex_m::singleton!(: Memory = Memory::new()) {
        Some(memory) => check(memory),
        None => fail("the memory is taken"),
    };
    debug::exit(status);
    loop {
        cortex_m::asm::wfi();
    }
}

fn check(memory: &mut Memory) -> debug::ExitStatus {
    let mut timer = cortex_m::Peripherals::take().map(|peripherals| peripherals.SYST);
    if let Some(timer) = &mut timer {
        timer.set_clock_source(SystClkSource::Core);
        timer.set_reload(0x00ff_ffff);
        timer.clear_current();
        timer.enable_counter();
    }
    let outcome = match scenario::run(memory) {
        Ok(outcome) if outcome == expected::OUTCOME => outcome,
        Ok(outcome) => return fail(format_args!("expected {:?}, found {outcome:?}", expected::OUTCOME)),
        Err(error) => return fail(error),
    };
    let ticks = timer.map_or(0, |_| 0x00ff_ffff - cortex_m::peripheral::SYST::get_current());
    hprintln!("a model of {} bytes keeps its promise {:016x}", MODEL.len(), outcome.features);
    hprintln!(
        "features, self-test and matching: about {} million instructions, {} bytes of memory",
        ticks / (1_000_000 / TICK),
        size_of::<Memory>() - MODEL.len()
    );
    if let Err(error) = scenario::refuse_damage(memory) {
        return fail(error);
    }
    hprintln!("damaged and shortened copies are refused");
    debug::EXIT_SUCCESS
}

fn fail(why: impl Display) -> debug::ExitStatus {
    hprintln!("error: {}", why);
    debug::EXIT_FAILURE
}
