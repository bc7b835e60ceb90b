//! Ranks that only know an address meet once, to learn the 128 bytes that name an NCCL job.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::DistributedError;
use super::launch::Launch;

/// Bytes of a job's name.
pub(super) const ID_BYTES: usize = 128;
/// What a rank says first, so that a stranger at the port learns nothing and a mistaken address is noticed.
const GREETING: &[u8; 16] = b"pass-host rank 1";
/// How long ranks wait for each other: queues of clusters start tasks at different times.
const PATIENCE: Duration = Duration::from_secs(600);
const RETRY: Duration = Duration::from_millis(100);
/// PyTorch's default, and one above for jobs whose launcher listens at `MASTER_PORT` itself.
const PORT: u16 = 29500;

/// Where rank 0 waits: `MASTER_ADDR` and `MASTER_PORT`, or this machine if all ranks are on it.
pub(super) fn address(
    launch: &Launch,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<(String, u16), DistributedError> {
    let invalid = |variable: &str, expected: &str, found: String| DistributedError::Environment {
        variable: variable.into(),
        expected: expected.into(),
        found,
    };
    let host = match variable("MASTER_ADDR").filter(|host| !host.is_empty()) {
        Some(host) => host,
        None if launch.local_size == Some(launch.size) => "127.0.0.1".into(),
        None => {
            return Err(invalid(
                "MASTER_ADDR",
                "the host of rank 0, for ranks on several machines",
                "none".into(),
            ));
        }
    };
    let port = match variable("MASTER_PORT").filter(|port| !port.is_empty()) {
        None => PORT,
        Some(text) => text.parse().map_err(|_| invalid("MASTER_PORT", "a port, 1 to 65535", text))?,
    };
    // torchrun keeps its own store there
    let taken = variable("TORCHELASTIC_USE_AGENT_STORE").is_some();
    Ok((host, if taken { port.wrapping_add(1) } else { port }))
}

/// The bytes of rank 0, on every rank.
pub(super) fn meet(
    launch: &Launch,
    (host, port): (String, u16),
    own: Option<[u8; ID_BYTES]>,
) -> Result<[u8; ID_BYTES], DistributedError> {
    let met = match own {
        Some(id) => serve(port, launch.size - 1, &id).map(|()| id),
        None => ask(&host, port),
    };
    met.map_err(|source| DistributedError::Rendezvous {
        rank: launch.rank,
        address: format!("{host}:{port}"),
        source,
    })
}

fn late(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}

fn serve(port: u16, others: usize, id: &[u8; ID_BYTES]) -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    listener.set_nonblocking(true)?;
    let (deadline, mut met) = (Instant::now() + PATIENCE, 0);
    while met < others {
        match listener.accept() {
            Ok((stream, _)) => met += usize::from(tell(stream, id).is_ok()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(RETRY),
            Err(error) => return Err(error),
        }
        if Instant::now() > deadline {
            return Err(late(format!("{met} of {others} ranks came within {} s", PATIENCE.as_secs())));
        }
    }
    Ok(())
}

/// Answers one rank; whoever does not greet gets nothing.
fn tell(mut stream: TcpStream, id: &[u8; ID_BYTES]) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut greeting = [0; GREETING.len()];
    stream.read_exact(&mut greeting)?;
    match &greeting == GREETING {
        true => stream.write_all(id),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "no rank")),
    }
}

fn ask(host: &str, port: u16) -> io::Result<[u8; ID_BYTES]> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = TcpStream::connect((host, port)).and_then(|mut stream| {
            stream.write_all(GREETING)?;
            let mut id = [0; ID_BYTES];
            stream.read_exact(&mut id)?;
            Ok(id)
        });
        match answer {
            Ok(id) => return Ok(id),
            Err(error) if Instant::now() > deadline => return Err(late(error.to_string())),
            Err(_) => sleep(RETRY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(rank: usize, local_size: usize) -> Launch {
        let variables = "RANK, WORLD_SIZE";
        Launch { rank, size: 3, local_rank: rank, local_size: Some(local_size), variables, by_mpi: false }
    }

    #[test]
    fn ranks_meet_whatever_their_order_and_strangers_learn_nothing() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let at = |rank: usize, own| meet(&launch(rank, 3), ("127.0.0.1".into(), free), own);
        std::thread::scope(|scope| {
            let early = scope.spawn(|| at(2, None));
            sleep(Duration::from_millis(150));
            let first = scope.spawn(|| at(0, Some([7; ID_BYTES])));
            sleep(Duration::from_millis(150));
            if let Ok(mut stranger) = TcpStream::connect(("127.0.0.1", free)) {
                stranger.write_all(b"GET / HTTP/1.1\r\n").unwrap();
                let mut answer = Vec::new();
                stranger.read_to_end(&mut answer).ok();
                assert!(answer.is_empty());
            }
            let late = scope.spawn(|| at(1, None));
            for rank in [first, early, late] {
                assert_eq!(rank.join().unwrap().unwrap(), [7; ID_BYTES]);
            }
        });
    }

    #[test]
    fn the_address_comes_from_the_launcher() {
        let with = |pairs: &'static [(&str, &str)]| {
            move |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        let given = [("MASTER_ADDR", "node7"), ("MASTER_PORT", "1234")];
        assert!(address(&launch(1, 1), with(&[])).unwrap_err().to_string().contains("MASTER_ADDR"));
        assert_eq!(address(&launch(1, 3), with(&[])).unwrap(), ("127.0.0.1".into(), PORT));
        let pairs: &'static [(&str, &str)] = Box::leak(Box::new(given));
        assert_eq!(address(&launch(1, 1), with(pairs)).unwrap(), ("node7".into(), 1234));
        let torchrun: &'static [(&str, &str)] = Box::leak(Box::new([
            ("MASTER_ADDR", "a"),
            ("MASTER_PORT", "5"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ]));
        assert_eq!(address(&launch(1, 1), with(torchrun)).unwrap().1, 6);
        assert!(address(&launch(1, 3), with(&[("MASTER_PORT", "x")])).is_err());
    }
}
