//! Runs the scenario on a Cortex-M and compares it, bit for bit, with what the workstation computed.
#![no_std]
#![no_main]

mod expected;
mod scenario;

use cortex_m_rt::entry;
use cortex_m_semihosting::{debug, hprintln};
use panic_semihosting as _;

#[entry]
fn main() -> ! {
    match scenario::run() {
        Ok(outcome) if outcome == expected::OUTCOME => {
            hprintln!("matching, aggregation and loss agree with the workstation: {:?}", outcome.losses);
            debug::exit(debug::EXIT_SUCCESS);
        }
        Ok(outcome) => {
            hprintln!("expected {:?}\nfound {:?}", expected::OUTCOME, outcome);
            debug::exit(debug::EXIT_FAILURE);
        }
        Err(error) => {
            hprintln!("error: {}", error);
            debug::exit(debug::EXIT_FAILURE);
        }
    }
    loop {
        cortex_m::asm::wfi();
    }
}
